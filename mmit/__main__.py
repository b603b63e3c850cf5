"""`python -m mmit`, and so `torchrun -m mmit`."""

from mmit.cli import main

main()
