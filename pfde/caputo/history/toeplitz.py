"""The Toeplitz blocks of a kernel: as matrices, as spectra, and by groups of components."""

from __future__ import annotations

import torch


class Toeplitz:
    """The Toeplitz blocks T[i, v] = table[origin - i + v] of a kernel, as matrices and as spectra.

    `kernel` is (O, I, N+1, G); table[q] = kappa[Q - q] forward and kappa[q] in reverse, zero at the lags outside 1..N.
    `components`, (d,), gives each component its index into G, and None means that all share one kernel; `group` below
    selects some indices, or None all.  Up to `bound` numbers the table is held; beyond (many groups) its parts are
    gathered from the kernel whenever they are needed.  Temporaries keep to about `limit` numbers.
    """

    def __init__(
        self, kernel: torch.Tensor, components: torch.Tensor | None, Q: int, reverse: bool, limit: int, bound: int
    ) -> None:
        self.kernel, self.components, self.Q, self.reverse = kernel, components, Q, reverse
        self.limit, self.bound = limit, bound
        self.O, self.I, steps, self.G = kernel.shape
        self.N = steps - 1
        self.every = torch.arange(self.G, device=kernel.device)
        held = self.G == 1 or kernel.numel() // steps * Q <= bound
        self.tables = [self._gather(i, 0, Q + 1, self.every) for i in range(self.I)] if held else []
        self.matrices: list[torch.Tensor] = []
        self.panels = [] if components is None else _panels(components, self.G)

    def keep(self, corner: int, tall: int, wide: int) -> None:
        """Hold the block of `tall` rows, `wide` columns with origin `corner`, unless it is too large."""
        if self.O * self.I * self.G * tall * wide <= self.bound:
            self.corner, self.tall, self.wide = corner, tall, wide
            self.matrices = [self._build(i, corner, tall, wide, None) for i in range(self.I)]

    def multiply(self, out: torch.Tensor, i: int, origin: int, m: int, x: torch.Tensor, beta: int) -> None:
        """out = beta out + T x for out (m O, d), x (length, d); each component with the T of its group."""
        if self.components is None:
            out.addmm_(self.block(i, origin, m, len(x), None)[0], x, beta=beta)
            return
        if beta == 0:
            out.zero_()
        for which, index in self.panels:
            if isinstance(index, slice):
                out[:, index].addmm_(self.block(i, origin, m, len(x), which)[0], x[:, index])
                continue
            piece = max(1, self.limit // len(index))
            for v in range(0, len(x), piece):
                part = x[v : v + piece].index_select(1, index)
                out.index_add_(1, index, self.block(i, origin + v, m, len(part), which)[0] @ part)
        if not self.panels:
            self._componentwise(out, i, origin, m, x)

    def _componentwise(self, out: torch.Tensor, i: int, origin: int, m: int, x: torch.Tensor) -> None:
        assert self.components is not None
        piece = max(1, min(len(x), self.limit // len(out)))
        columns = max(1, self.limit // (len(out) * piece))
        for v in range(0, len(x), piece):
            part = x[v : v + piece]
            for c in range(0, x.shape[1], columns):
                T = self.block(i, origin + v, m, len(part), self.components[c : c + columns])
                out[:, c : c + columns] += torch.bmm(T, part[:, c : c + columns].t().unsqueeze(2)).squeeze(2).t()

    def block(self, i: int, origin: int, m: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        """T of input i, (groups, m O, length): rows interleave the outputs; a slice of what is held if it can be."""
        if self.matrices:
            v = max(0, origin - self.corner)
            u = v - (origin - self.corner)
            if u + m <= self.tall and v + length <= self.wide:
                part = self.matrices[i][:, u * self.O : (u + m) * self.O, v : v + length]
                return part if group is None else part.index_select(0, group)
        return self._build(i, origin, m, length, group)

    def spectrum(self, origin: int, m: int, S: int, n: int, group: torch.Tensor | None) -> torch.Tensor:
        """The DFT of length n of w -> table[origin - w], -S < w < m, (I, groups, O, n/2 + 1).

        Multiplication by it is the block of m rows and S columns, in the first m entries of the circular product.
        """
        spectra = []
        for i in range(self.I):
            w = self._window(i, origin - m + 1, m + S - 1, group)
            gap = w.new_zeros((*w.shape[:2], n - m - S + 1))
            spectra.append(torch.fft.rfft(torch.cat([w[..., :m].flip(2), gap, w[..., m:].flip(2)], dim=2)))
        return torch.stack(spectra)

    def _build(self, i: int, origin: int, m: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        # torch has no negative strides: a Hankel view, its rows reversed by a copy, is the Toeplitz matrix.
        w = self._window(i, origin - m + 1, m + length - 1, group)
        return w.unfold(2, length, 1).flip(2).transpose(1, 2).reshape(w.shape[0], m * self.O, length)

    def window(self, i: int, q: int, length: int) -> torch.Tensor:
        """table[q : q + length] of input i without groups, (O, length)."""
        return self._window(i, q, length, None)[0]

    def _window(self, i: int, q: int, length: int, group: torch.Tensor | None) -> torch.Tensor:
        """table[q : q + length] of input i, (groups, O, length); a view of the table held if it can be."""
        if self.tables:
            part = self.tables[i][:, :, q : q + length]
            return part if group is None else part.index_select(0, group)
        return self._gather(i, q, length, self.every if group is None else group)

    def _gather(self, i: int, q: int, length: int, group: torch.Tensor) -> torch.Tensor:
        k = q if self.reverse else self.Q - q - length + 1
        lo, hi = max(k, 1), min(k + length, self.N + 1)
        if hi <= lo:
            return self.kernel.new_zeros((len(group), self.O, length))
        part = self.kernel[:, i, lo:hi].index_select(2, group).permute(2, 0, 1)
        part = torch.nn.functional.pad(part, (lo - k, k + length - hi))
        return (part if self.reverse else part.flip(2)).contiguous()


def _panels(group: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, slice | torch.Tensor]]:
    """(group, its components) where the groups are large enough to be multiplied one by one, else nothing."""
    if groups * 16 > len(group):
        return []
    panels: list[tuple[torch.Tensor, slice | torch.Tensor]] = []
    for g in range(groups):
        index = torch.nonzero(group == g).squeeze(1)
        if len(index):
            lo, hi = int(index[0]), int(index[-1]) + 1
            panels.append((torch.tensor([g], device=group.device), slice(lo, hi) if hi - lo == len(index) else index))
    return panels
