"""What users call: `fdeint`, `odeint`, `odeint_event`, `solve`. Each fills a request and hands it to an engine."""
