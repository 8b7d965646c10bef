"""Two processes compute what one does: collectives, layers, embeddings, attention, the loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn

# One start of two processes serves all checks; each check is a function below.
CHECKS = (
    "collectives",
    "parameters",
    "linear_layers",
    "mlps",
    "embeddings",
    "attention",
    "loss",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[str]:
    """What the two processes report: a line for each check that passed."""
    rendezvous = tmp_path_factory.mktemp("processes") / "rendezvous"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(flash_attn.__file__).parents[1]), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rendezvous), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "".join(error for _, error in results)
    return [f"{out}\n{errors}" for out, _ in results]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    for outcome in outcomes:
        assert f"passed: {check}\n" in outcome, outcome


def main(rendezvous: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for check in CHECKS:
        torch.manual_seed(0)  # the same tensors in both
        globals()[f"check_{check}"](rank, dist.group.WORLD)
        print(f"passed: {check}", flush=True)
    dist.destroy_process_group()


def part(tensor, rank: int, dim: int = 0):
    """This process' half of a tensor."""
    return tensor.chunk(2, dim)[rank]


def close(actual, expected) -> None:
    import torch

    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def check_collectives(rank, group) -> None:
    import torch

    from flash_attn.utils import distributed

    both, weight = torch.randn(2, 4, 3), torch.randn(2, 8, 3)
    x = both[rank].clone().requires_grad_()
    gathered = distributed.all_gather(x, group)
    close(gathered, both.flatten(0, 1))
    gathered.backward(weight[rank])
    close(x.grad, part(weight.sum(0), rank))

    x = both[rank].clone().requires_grad_()
    scattered = distributed.reduce_scatter(x, group)
    close(scattered, part(both.sum(0), rank))
    scattered.backward(weight[rank, :2])
    close(x.grad, weight[:, :2].flatten(0, 1))

    x = both[rank].clone().requires_grad_()
    reduced = distributed.all_reduce(x, group)
    close(reduced, both.sum(0))
    close(x.detach(), both[rank])
    reduced.backward(weight[0, :4])
    close(x.grad, weight[0, :4])

    output, handle = distributed.all_gather_raw(both[rank], group, async_op=True)
    handle.wait()
    close(output, both.flatten(0, 1))
    close(distributed.reduce_scatter_raw(both[rank], group)[0], part(both.sum(0), rank))
    close(distributed.all_reduce_raw(both[rank].clone(), group)[0], both.sum(0))
    try:
        distributed.reduce_scatter_raw(both[rank, :3], group)
    except ValueError as error:
        assert "multiple of the 2 processes" in str(error)
    else:
        raise AssertionError("an uneven split was accepted")


def check_parameters(rank, group) -> None:
    import torch
    from torch import nn

    from flash_attn.utils.distributed import (
        allreduce_sequence_parallel_grad,
        sync_shared_params,
    )

    model = nn.ModuleDict({"shared": nn.Linear(2, 2), "own": nn.Linear(2, 2)})
    for parameter in model.parameters():
        parameter.data.fill_(float(rank + 1))
        parameter.grad = torch.full_like(parameter, float(rank + 1))
    for parameter in model["shared"].parameters():
        parameter._shared_params = parameter._sequence_parallel = True
    sync_shared_params(model, group)
    allreduce_sequence_parallel_grad(model, group)
    for parameter in model["shared"].parameters():
        assert (parameter == 1.0).all() and (parameter.grad == 3.0).all()
    for parameter in model["own"].parameters():
        assert (parameter == rank + 1.0).all() and (parameter.grad == rank + 1.0).all()
    allreduce_sequence_parallel_grad(nn.Linear(1, 1), group)


def tokens(x, rank: int, sequence_parallel: bool):
    """The input of a parallel layer: a leaf, with this process' tokens or all of them."""
    own = part(x, rank) if sequence_parallel else x
    return own.clone().requires_grad_()


def same_everywhere(module) -> None:
    """Parameters that do not depend on what a process has drawn before."""
    import torch

    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def compare(module, plain, x, rank, sequence_parallel, share_of_gradient) -> None:
    """Outputs, input gradients and the gradients of weights, of `module` and the whole `plain`.

    share_of_gradient(name, gradient of plain) is what the module's parameter of that name has.
    """
    import torch

    own, whole = tokens(x, rank, sequence_parallel), x.clone().requires_grad_()
    out, expected = module(own), plain(whole)
    torch.manual_seed(1)  # the processes have drawn different numbers of parameters
    dout = torch.randn_like(expected)
    close(out, part(expected, rank) if sequence_parallel else expected)
    out.backward(part(dout, rank) if sequence_parallel else dout)
    expected.backward(dout)
    close(own.grad, part(whole.grad, rank) if sequence_parallel else whole.grad)
    gradients = dict(plain.named_parameters())
    for name, parameter in module.named_parameters():
        close(parameter.grad, share_of_gradient(name, gradients[name].grad))


def check_linear_layers(rank, group) -> None:
    import torch
    from torch import nn

    from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear

    x, first, second = torch.randn(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)
    dense = FusedDense(8, 5)
    close(dense(part(x, rank), process_group=group), dense(x))
    for sequence_parallel in (False, True):
        column = ColumnParallelLinear(8, 12, group, sequence_parallel=sequence_parallel)
        row = RowParallelLinear(12, 8, group, sequence_parallel=sequence_parallel)
        with torch.no_grad():
            column.weight.copy_(part(first.weight, rank))
            column.bias.copy_(part(first.bias, rank))
            row.weight.copy_(part(second.weight, rank, 1))
            if rank == 0:
                row.bias.copy_(second.bias)
        assert (row.bias is None) == (rank == 1)

        def share(name, gradient):
            dim = 1 if name == "1.weight" else 0
            return gradient if name == "1.bias" else part(gradient, rank, dim)

        plain = nn.Sequential(first, second)
        plain.zero_grad()
        compare(nn.Sequential(column, row), plain, x, rank, sequence_parallel, share)
    assert ColumnParallelLinear(8, 9, group, multiple_of=3).out_features == (6, 3)[rank]


def check_mlps(rank, group) -> None:
    import torch

    from flash_attn.modules.mlp import (
        FusedMLP,
        GatedMlp,
        Mlp,
        ParallelFusedMLP,
        ParallelGatedMlp,
        ParallelMLP,
    )

    def copy(module, plain, gated=False):
        with torch.no_grad():
            pieces = plain.fc1.weight.chunk(2) if gated else [plain.fc1.weight]
            module.fc1.weight.copy_(torch.cat([part(piece, rank) for piece in pieces]))
            pieces = plain.fc1.bias.chunk(2) if gated else [plain.fc1.bias]
            module.fc1.bias.copy_(torch.cat([part(piece, rank) for piece in pieces]))
            module.fc2.weight.copy_(part(plain.fc2.weight, rank, 1))
            if rank == 0:
                module.fc2.bias.copy_(plain.fc2.bias)

    x = torch.randn(6, 8)
    for sequence_parallel in (False, True):
        option = {"sequence_parallel": sequence_parallel}
        for plain, module, gated in (
            (Mlp(8, 16), ParallelMLP(8, 16, process_group=group, **option), False),
            (FusedMLP(8, 16), ParallelFusedMLP(8, 16, process_group=group, **option), False),
            (
                GatedMlp(8, 16, multiple_of=4),
                ParallelGatedMlp(8, group, 16, multiple_of=4, **option),
                True,
            ),
        ):
            same_everywhere(plain)
            copy(module, plain, gated)

            def share(name, gradient, gated=gated):
                if name == "fc2.bias":
                    return gradient
                if name.startswith("fc1") and gated:
                    return torch.cat([part(piece, rank) for piece in gradient.chunk(2)])
                return part(gradient, rank, 1 if name == "fc2.weight" else 0)

            compare(module, plain, x, rank, sequence_parallel, share)
    fused = FusedMLP(8, 16)
    same_everywhere(fused)
    doubled = fused(part(x, rank), process_group=group)
    close(doubled, part(2.0 * fused(x), rank))


def check_embeddings(rank, group) -> None:
    import torch

    from flash_attn.modules.embedding import (
        GPT2Embeddings,
        ParallelGPT2Embeddings,
        VocabParallelEmbedding,
    )

    ids, plain = torch.randint(0, 10, (2, 6)), GPT2Embeddings(8, 10, 6)
    same_everywhere(plain)
    for sequence_parallel in (False, True):
        module = ParallelGPT2Embeddings(8, 10, 6, group, sequence_parallel=sequence_parallel)
        with torch.no_grad():
            module.word_embeddings.weight.copy_(part(plain.word_embeddings.weight, rank))
            places = part(plain.position_embeddings.weight, rank, 1)
            module.position_embeddings.weight.copy_(places)
        expected = plain(ids).flatten(0, 1)
        out = module(ids, combine_batch_seqlen_dim=True)
        close(out, part(expected, rank) if sequence_parallel else expected)
        torch.manual_seed(1)
        dout = torch.randn_like(expected)
        out.backward(part(dout, rank) if sequence_parallel else dout)
        plain.zero_grad()
        expected.backward(dout)
        words = part(plain.word_embeddings.weight.grad, rank)
        close(module.word_embeddings.weight.grad, words)
        places = part(plain.position_embeddings.weight.grad, rank, 1)
        close(module.position_embeddings.weight.grad, places)
    try:
        VocabParallelEmbedding(9, 4, process_group=group)
    except ValueError as error:
        assert "num_embeddings: must be a multiple of 2" in str(error)
    else:
        raise AssertionError("an uneven vocabulary was accepted")


def check_attention(rank, group) -> None:
    import torch

    from flash_attn.modules.mha import MHA, ParallelMHA

    batch, seqlen, dim, heads = 2, 4, 16, 4
    x = torch.randn(batch * seqlen, dim)
    for heads_kv in (4, 2):
        for sequence_parallel in (False, True):
            options = {"causal": True, "rotary_emb_dim": 4}
            plain = MHA(dim, heads, heads_kv, **options)
            same_everywhere(plain)
            module = ParallelMHA(
                dim, heads, group, heads_kv, **options, sequence_parallel=sequence_parallel
            )
            split = [dim, *[4 * heads_kv] * 2]

            def local(tensor, split=split):
                return torch.cat([part(piece, rank) for piece in tensor.split(split)])

            with torch.no_grad():
                module.Wqkv.weight.copy_(local(plain.Wqkv.weight))
                module.Wqkv.bias.copy_(local(plain.Wqkv.bias))
                module.out_proj.weight.copy_(part(plain.out_proj.weight, rank, 1))
                if rank == 0:
                    module.out_proj.bias.copy_(plain.out_proj.bias)
            own, whole = tokens(x, rank, sequence_parallel), x.clone().requires_grad_()
            out = module(own, seqlen=seqlen)
            expected = plain(whole.view(batch, seqlen, dim)).view(-1, dim)
            close(out, part(expected, rank) if sequence_parallel else expected)
            torch.manual_seed(1)
            dout = torch.randn_like(expected)
            out.backward(part(dout, rank) if sequence_parallel else dout)
            expected.backward(dout)
            close(own.grad, part(whole.grad, rank) if sequence_parallel else whole.grad)
            close(module.Wqkv.weight.grad, local(plain.Wqkv.weight.grad))
            close(module.out_proj.weight.grad, part(plain.out_proj.weight.grad, rank, 1))
            assert module.allocate_inference_cache(1, 3).shape == (1, 3, 2, heads_kv // 2, 4)
    slopes = ParallelMHA(dim, heads, group, use_alibi=True, use_flash_attn=True).inner_attn
    close(slopes.alibi_slopes, part(torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]), rank))


def check_loss(rank, group) -> None:
    import torch
    import torch.nn.functional as F

    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    logits, labels = torch.randn(9, 12) * 3.0, torch.randint(0, 12, (9,))
    labels[4] = -100
    for smoothing, square in ((0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)):
        whole = logits.clone().requires_grad_()
        scaled = 0.8 * whole
        z_loss = square * torch.logsumexp(scaled, 1).square().masked_fill(labels == -100, 0.0)
        expected = z_loss + F.cross_entropy(
            scaled, labels, reduction="none", label_smoothing=smoothing
        )
        own = part(logits, rank, 1).clone().requires_grad_()
        options = {
            "label_smoothing": smoothing,
            "logit_scale": 0.8,
            "lse_square_scale": square,
            "process_group": group,
        }
        losses, z_losses = cross_entropy_loss(own, labels, **options)
        close(losses, expected)
        close(z_losses, z_loss)
        dlosses = torch.randn(9)
        losses.backward(dlosses)
        expected.backward(dlosses)
        close(own.grad, part(whole.grad, rank, 1))
        mean = CrossEntropyLoss(**options)(part(logits, rank, 1), labels)
        close(mean, expected.sum() / 8)
    local_lse = torch.logsumexp(part(logits, rank, 1), 1)
    losses, _ = cross_entropy_loss(part(logits, rank, 1), labels, local_lse, process_group=group)
    close(losses, F.cross_entropy(logits, labels, reduction="none"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
