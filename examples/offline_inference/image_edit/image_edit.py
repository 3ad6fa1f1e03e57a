"""Image and text to image offline, with or without CFG-Parallel; --image may be given several times.

    python image_edit.py --model Qwen/Qwen-Image-Edit-2509 --image bear.png --prompt "make it snow" \\
        --negative_prompt " " --cfg_scale 4.0 --cfg_parallel_size 2 --compare --output snow.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generation import add_option, make_parser, run

if __name__ == "__main__":
    parser = make_parser(__doc__, model=None, prompt="make it look like winter", output="output.png")
    add_option(parser, "image", action="append", required=True, help="file of an image to start from")
    add_option(
        parser, "num_images", type=int, default=1, help="images with seeds seed, seed + 1, ... in output_0.png, ..."
    )
    args = parser.parse_args()
    sys.exit(run(args, images=args.image))
