"""Text to video offline, with or without CFG-Parallel; with --image, the first frame, image to video. Writes an MP4.

    python text_to_video.py --model Wan-AI/Wan2.2-TI2V-5B-Diffusers --prompt "a cat walks on the grass" \\
        --negative_prompt "static, blurry" --cfg_scale 5.0 --num_frames 81 --cfg_parallel_size 2 --output cat.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generation import add_option, make_parser, run

if __name__ == "__main__":
    parser = make_parser(__doc__, model=None, prompt="a cat walks on the grass", output="output.mp4")
    add_option(parser, "num_frames", type=int, help="default: the model's")
    add_option(parser, "fps", type=float, help="frames a second of the file (default: the model's)")
    add_option(parser, "image", help="file of the first frame, for an image-to-video model")
    args = parser.parse_args()
    sys.exit(run(args, images=[args.image] if args.image else [], fps=args.fps))
