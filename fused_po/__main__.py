"""``python -m fused_po`` is ``fused-po``."""

import sys

from fused_po.cli import main

sys.exit(main())
