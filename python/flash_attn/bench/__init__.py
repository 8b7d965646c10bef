"""The benchmark: `flash-attn-plus bench`, or `python -m flash_attn.bench`.

Each case runs here and in the peers by turns within one process; figures come with the peer's, with
the spread of their samples, and with the share of what this machine was measured to reach.
"""
