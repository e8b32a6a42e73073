"""`deepspeed train.py …`, `torchrun train.py …`, `python train.py …`: one stage of training."""

import sys

from moellava.startup import importing

if __name__ == "__main__":
    with importing():
        from moellava.train.train import main
    sys.exit(main())
