"""``python -m ldm`` is the console script ``ldm``."""

from ldm.commands.main import main

main()
