"""Writes the golden files of this folder: attention by its definition, in NumPy and float64.

Shares no code with the library. Whole matrices, one head at a time, and a Philox of its own. Each
file holds the options of a case and the expected results, a line each: a key and its numbers. The
inputs are not stored: formula() gives them, as tests/cpp/reference_call.h does.

    python tests/golden/make_golden.py        # rewrites tests/golden/*.txt
"""

from pathlib import Path

import numpy as np

TAGS = {"q": 1, "k": 2, "v": 3, "bias": 4, "sink": 5, "alibi": 6, "dout": 7}

DEFAULTS = dict(
    batch=2,
    seqlen_q=5,
    seqlen_k=7,
    lengths_q=[],
    lengths_k=[],
    seqused_k=[],
    spare_rows=0,
    page_size=0,
    num_heads=2,
    num_heads_kv=2,
    head_dim=4,
    head_dim_v=4,
    causal=0,
    window_left=-1,
    window_right=-1,
    softmax_scale=None,
    softcap=0.0,
    alibi_rank=0,
    bias_shape=[],
    boolean_bias=0,
    sink=0,
    dropout_p=0.0,
    seed=0,
    offset=0,
)

CASES = {
    "plain": {},
    "causal_more_keys": dict(seqlen_q=4, seqlen_k=9, causal=1, head_dim=3, head_dim_v=5),
    "causal_more_queries": dict(seqlen_q=9, seqlen_k=4, causal=1, sink=1),
    "window_softcap_scale": dict(
        seqlen_q=8, seqlen_k=11, window_left=2, window_right=3, softcap=1.5, softmax_scale=0.75
    ),
    "alibi_gqa": dict(num_heads=6, num_heads_kv=2, alibi_rank=2, causal=1, window_left=3),
    "bias_broadcast": dict(
        num_heads=4, num_heads_kv=2, bias_shape=[4, 1, 7], softcap=2.0, alibi_rank=1
    ),
    "bias_boolean": dict(seqlen_q=6, seqlen_k=3, bias_shape=[2, 1, 6, 3], boolean_bias=1),
    "dropout": dict(
        seqlen_q=9,
        seqlen_k=21,
        dropout_p=0.4,
        seed=0x123456789ABCDEF0,
        offset=0xFEDCBA9876543210,
        head_dim=2,
        head_dim_v=2,
    ),
    "varlen": dict(
        lengths_q=[3, 0, 6, 2],
        lengths_k=[5, 4, 3, 0],
        spare_rows=2,
        causal=1,
        sink=1,
        num_heads=4,
        num_heads_kv=2,
        dropout_p=0.25,
        seed=77,
        bias_shape=[6, 5],
    ),
    "paged": dict(
        lengths_q=[4, 1, 3],
        lengths_k=[11, 6, 8],
        seqused_k=[9, 6, 0],
        page_size=3,
        window_left=4,
        num_heads=4,
        num_heads_kv=1,
        alibi_rank=1,
    ),
}


def formula_bits(tag, count):
    mask = np.uint64(0xFFFFFFFF)
    index = np.arange(count, dtype=np.uint64)
    h = (index * np.uint64(2654435761) + np.uint64(TAGS[tag] * 40503 + 12345)) & mask
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(2246822519)) & mask
    return h ^ (h >> np.uint64(13))


def formula(tag, shape):
    bits = formula_bits(tag, int(np.prod(shape)))
    return ((bits % np.uint64(4001)).astype(np.float64) - 2000.0).reshape(shape) / 1024.0


def philox4x32_10(counter, key):
    """counter: four and key: two Python integers of 32 bits."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


assert philox4x32_10(
    [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def dropout_factors(case, batch, head, rows, keys):
    """M_ij: 1 / (1 - p) where kept, 0 where dropped."""
    p = case["dropout_p"]
    if p == 0.0:
        return np.ones((rows, keys))
    threshold = max(1, int(np.floor((1.0 - p) * 65536 + 0.5)))
    seed, offset = case["seed"], case["offset"]
    key = [seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32)]
    factors = np.zeros((rows, keys))
    for i in range(rows):
        for j in range(keys):
            counter = [j // 8, i, batch * case["num_heads"] + head, offset & 0xFFFFFFFF]
            word = philox4x32_10(counter, key)[j % 8 // 2]
            half = word >> 16 if j % 2 else word & 0xFFFF
            factors[i, j] = 1.0 / (1.0 - p) if half < threshold else 0.0
    return factors


def masked_scores(case, q, k, slope, bias):
    """Scores of one head, -inf where masked, and the derivative of softcap."""
    rows, keys = len(q), len(k)
    scale = case["head_dim"] ** -0.5 if case["softmax_scale"] is None else case["softmax_scale"]
    s = scale * (q @ k.T)
    slope_of_cap = np.ones_like(s)
    if case["softcap"] > 0:
        s = case["softcap"] * np.tanh(s / case["softcap"])
        slope_of_cap = 1.0 - (s / case["softcap"]) ** 2
    position = np.arange(rows)[:, None] + (keys - rows)
    key = np.arange(keys)[None, :]
    s = s - slope * np.abs(position - key)
    visible = np.ones((rows, keys), dtype=bool)
    if bias is not None and case["boolean_bias"]:
        visible &= bias[:rows, :keys]
    elif bias is not None:
        s = s + bias[:rows, :keys]
    if case["window_left"] >= 0:
        visible &= key >= position - case["window_left"]
    if case["causal"]:
        visible &= key <= position
    elif case["window_right"] >= 0:
        visible &= key <= position + case["window_right"]
    return scale, np.where(visible, s, -np.inf), slope_of_cap


def softmax(scores, sink):
    if sink is not None:
        scores = np.concatenate([scores, np.full((len(scores), 1), sink)], axis=1)
    probability = np.zeros_like(scores)
    lse = np.full(len(scores), np.inf)
    for i, row in enumerate(scores):
        finite = row[row > -np.inf]
        if len(finite) > 0:
            lse[i] = finite.max() + np.log(np.exp(finite - finite.max()).sum())
            probability[i] = np.exp(row - lse[i])
    return (probability if sink is None else probability[:, :-1]), lse


def one_head(case, q, k, v, dout, slope, bias, sink, factors):
    scale, scores, slope_of_cap = masked_scores(case, q, k, slope, bias)
    probability, lse = softmax(scores, sink)
    weights = probability * factors
    out, bound = weights @ v, weights @ np.abs(v)
    dp, dp_bound = factors * (dout @ v.T), factors * (np.abs(dout) @ np.abs(v).T)
    delta, delta_bound = (dout * out).sum(1), (np.abs(dout) * bound).sum(1)
    ds = probability * (dp - delta[:, None])
    ds_bound = probability * (dp_bound + delta_bound[:, None])
    dqk = scale * slope_of_cap * ds
    dqk_bound = scale * (2.0 - slope_of_cap) * ds_bound  # 1 - tanh^2, and so 1 + tanh^2
    result = dict(
        out=out,
        lse=lse,
        bound=bound,
        dq=dqk @ k,
        dk=dqk.T @ q,
        dv=weights.T @ dout,
        d_bias=ds,
        dq_bound=dqk_bound @ np.abs(k),
        dk_bound=dqk_bound.T @ np.abs(q),
        dv_bound=weights.T @ np.abs(dout),
        d_bias_bound=ds_bound,
    )
    if sink is not None:
        share = np.exp(sink - lse)
        result.update(d_sink=-(share * delta).sum(), d_sink_bound=(share * delta_bound).sum())
    return result


def block_table(case):
    """Pages from the last to the first; page 0 serves no sequence."""
    pages = [-(-length // case["page_size"]) for length in case["lengths_k"]]
    number, table = 1 + sum(pages), []
    page = number
    for count in pages:
        table.append([page - 1 - p for p in range(count)])
        page -= count
    return number, table


def layout(case):
    """Per sequence the row numbers of q and of k; then the shapes before [heads, head_dim]."""
    if not case["lengths_q"]:
        b, sq, sk = case["batch"], case["seqlen_q"], case["seqlen_k"]
        return (
            [np.arange(n * sq, (n + 1) * sq) for n in range(b)],
            [np.arange(n * sk, (n + 1) * sk) for n in range(b)],
            b * sq,
            b * sk,
        )
    ends_q = np.cumsum([0] + case["lengths_q"])
    ends_k = np.cumsum([0] + case["lengths_k"])
    used = case["seqused_k"] or case["lengths_k"]
    rows_q = [np.arange(ends_q[n], ends_q[n + 1]) for n in range(len(used))]
    total_q = ends_q[-1] + case["spare_rows"]
    if case["page_size"] == 0:
        rows_k = [np.arange(ends_k[n], ends_k[n] + used[n]) for n in range(len(used))]
        return rows_q, rows_k, total_q, ends_k[-1] + case["spare_rows"]
    size = case["page_size"]
    number, table = block_table(case)
    rows_k = [
        np.array([table[n][j // size] * size + j % size for j in range(used[n])], dtype=int)
        for n in range(len(used))
    ]
    return rows_q, rows_k, total_q, number * size


def run(case):
    h, hk = case["num_heads"], case["num_heads_kv"]
    rows_q, rows_k, total_q, total_k = layout(case)
    batch = len(rows_q)
    q = formula("q", (total_q, h, case["head_dim"]))
    k = formula("k", (total_k, hk, case["head_dim"]))
    v = formula("v", (total_k, hk, case["head_dim_v"]))
    dout = formula("dout", (total_q, h, case["head_dim_v"]))
    slopes = np.zeros((batch, h))
    if case["alibi_rank"] > 0:
        shape = (h,) if case["alibi_rank"] == 1 else (batch, h)
        slopes = np.broadcast_to(np.abs(formula("alibi", shape)), (batch, h))
    sinks = formula("sink", (h,)) if case["sink"] else [None] * h
    max_q = max(case["lengths_q"], default=case["seqlen_q"])
    max_k = max(case["lengths_k"], default=case["seqlen_k"])
    bias = None
    if case["bias_shape"]:
        count = int(np.prod(case["bias_shape"]))
        values = (
            formula_bits("bias", count) % np.uint64(4) != 0
            if case["boolean_bias"]
            else formula("bias", (count,))
        ).reshape(case["bias_shape"])
        bias = np.broadcast_to(values, (batch, h, max_q, max_k))

    lse = np.full((total_q, h), np.inf)
    shaped_like = dict(out=dout, bound=dout, dq=q, dk=k, dv=v, dq_bound=q, dk_bound=k, dv_bound=v)
    sums = {name: np.zeros_like(like) for name, like in shaped_like.items()}
    d_bias = {name: np.zeros((batch, h, max_q, max_k)) for name in ("d_bias", "d_bias_bound")}
    d_sink = {name: np.zeros(h) for name in ("d_sink", "d_sink_bound")}
    for b in range(batch):
        for head in range(h):
            rows, keys, kv = rows_q[b], rows_k[b], head // (h // hk)
            it = one_head(
                case,
                q[rows, head],
                k[keys, kv],
                v[keys, kv],
                dout[rows, head],
                slopes[b, head],
                None if bias is None else bias[b, head],
                sinks[head],
                dropout_factors(case, b, head, len(rows), len(keys)),
            )
            lse[rows, head] = it["lse"]
            for name in ("out", "bound", "dq", "dq_bound"):
                sums[name][rows, head] = it[name]
            for name in ("dk", "dv", "dk_bound", "dv_bound"):
                sums[name][keys, kv] += it[name]
            for name in d_bias:
                d_bias[name][b, head, : len(rows), : len(keys)] = it[name]
            for name in d_sink:
                d_sink[name][head] += it.get(name, 0.0)

    varlen = bool(case["lengths_q"])
    lse = lse.T if varlen else lse.reshape(batch, -1, h).transpose(0, 2, 1)
    results = dict(sums, lse=lse)
    if case["bias_shape"] and not case["boolean_bias"]:
        for name, value in d_bias.items():
            shape = [1] * (4 - len(case["bias_shape"])) + case["bias_shape"]
            axes = tuple(d for d in range(4) if shape[d] == 1)
            results[name] = value.sum(axis=axes)
    if case["sink"]:
        results.update(d_sink)
    return results


def main():
    folder = Path(__file__).resolve().parent
    for name, options in CASES.items():
        case = dict(DEFAULTS, **options)
        lines = []
        for key, value in options.items():
            numbers = value if isinstance(value, list) else [value]
            lines.append(" ".join([key] + [repr(number) for number in numbers]))
        for key, value in run(case).items():
            numbers = np.ravel(value)
            lines.append(" ".join([key] + [f"{number:.16g}" for number in numbers]))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
