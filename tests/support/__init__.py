"""What test modules share: references, models, mutants, launchers."""
