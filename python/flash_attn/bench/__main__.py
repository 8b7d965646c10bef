"""`python -m flash_attn.bench`."""

import sys

if __name__ == "__main__":
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "torch") != "torch":
            raise
        sys.exit(
            f"flash-attn-plus bench: PyTorch is not installed for {sys.executable}."
            " It is what the benchmark compares with: pip install torch"
        )
    from .cli import main

    sys.exit(main())
