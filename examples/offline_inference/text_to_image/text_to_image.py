"""Text to image offline, with or without CFG-Parallel.

    python text_to_image.py --prompt "a rocket on a black background" --negative_prompt " " --cfg_scale 4.0 \\
        --cfg_parallel_size 2 --compare --output rocket.png

With --compare it also runs with cfg_parallel_size 1 and logs both e2e_time_ms: the image is the same, byte for byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generation import add_option, make_parser, run

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji"

if __name__ == "__main__":
    parser = make_parser(
        __doc__, model=str(BUNDLED_MODEL), prompt="a rocket on a black background", output="output.png"
    )
    add_option(
        parser, "num_images", type=int, default=1, help="images with seeds seed, seed + 1, ... in output_0.png, ..."
    )
    sys.exit(run(parser.parse_args()))
