"""Double precision also where a forward asks for less."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
_WIDER |= {torch.complex64: torch.complex128}


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context every dtype that is written into a call, as ``x.float()`` does, is at least double.

    So are new tensors of no particular dtype.

    Two computations that agree but for rounding are told apart from two that differ a little only where nothing in
    between rounds more than that.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._default = torch.get_default_dtype()

    def __enter__(self) -> Self:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = kwargs.get("dtype")
        return func(*args, **{**kwargs, "dtype": _WIDER[written]} if written in _WIDER else kwargs)
