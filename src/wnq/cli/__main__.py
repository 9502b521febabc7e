"""``python -m wnq.cli``, which launchers of many processes need."""

from wnq.cli import main

main()
