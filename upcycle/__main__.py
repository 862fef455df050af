"""`python -m upcycle`, also for `accelerate launch -m upcycle`."""

from upcycle.cli import main

main()
