"""Runs calls on a device that PyTorch knows and nothing else does: its tensors live on the CPU, and
reading a value back from it is an error. Compares the results with the CPU's own."""

from __future__ import annotations

from typing import Any

import torch
from support import offsets, tensors, varlen_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import flash_attn
from flash_attn import flash_attn_with_kvcache
from flash_attn._attention import Options, backward, forward

# Of max |pretend - cpu| in fp32, for inputs and gradients of the usual size.
TOLERANCE = 1e-5


class Pretend(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device="pretend",
        )  # fmt: skip
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read back"

        def raw(x: Any) -> Any:
            if isinstance(x, Pretend):
                return x.raw
            return torch.device("cpu") if isinstance(x, torch.device) else x

        results = function(*tree_map(raw, args), **tree_map(raw, kwargs or {}))
        return tree_map(there, results)


class NewTensors(TorchDispatchMode):
    """Makes tensors that are created on the device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "pretend":
            return function(*args, **kwargs)
        return Pretend(function(*args, **(kwargs | {"device": "cpu"})))


def there(x: Any) -> Any:
    return Pretend(x) if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) else x


def compare(tensors: tuple[torch.Tensor, ...], options: Options) -> None:
    """Results and gradients on the device are those on the CPU."""
    results = []
    for place in (lambda x: x, there):
        q, k, v = (place(x.clone()) for x in tensors)
        placed = Options(*(place(x) for x in options))
        out, lse, _, seed = forward(q, k, v, None, None, placed, True, 7)
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        dout = place(torch.ones(out.shape))
        backward((dout, *gradients, None, None), q, k, v, out, lse, None, None, placed, seed)
        results.append((out, *gradients))
    for here, away in zip(*results):
        assert isinstance(away, Pretend)
        assert (here - away.raw).abs().max() <= TOLERANCE


def main() -> None:
    _setup_privateuseone_for_python_backend("pretend")
    with NewTensors(), torch.no_grad():
        q, k, v = tensors(head_dim_v=40)
        compare((q, k, v), Options(0.3, 0.2, False, (-1, -1), 0.0, None, False, False))
        slopes = torch.rand(4)
        compare((q, k, v), Options(0.0, None, True, (30, -1), 5.0, slopes, False, False))
        lengths_q, lengths_k = [30, 0, 17], [64, 5, 20]
        of_varlen = (offsets(lengths_q), offsets(lengths_k), 30, 64)
        compare(
            varlen_tensors(lengths_q, lengths_k),
            Options(0.1, None, True, (-1, -1), 0.0, None, False, False, *of_varlen),
        )
        new, cache = torch.randn(2, 3, 2, 64), torch.randn(2, 16, 2, 64)
        results = []
        for place in (lambda x: x, there):
            pages = place(cache.view(8, 4, 2, 64).clone())
            with torch.no_grad():
                out = flash_attn_with_kvcache(
                    place(q[:, :3]),
                    pages,
                    pages,
                    place(new),
                    place(new),
                    cache_seqlens=place(torch.tensor([5, 13], dtype=torch.int32)),
                    block_table=place(torch.arange(8, dtype=torch.int32).view(2, 4)),
                    causal=True,
                )
            results += [out, pages]
        assert (results[0] - results[2].raw).abs().max() <= TOLERANCE
        assert torch.equal(results[1], results[3].raw)
        print(flash_attn.explain(*map(there, (q, k, v))))


if __name__ == "__main__":
    main()
