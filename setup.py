"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "vllm_cfg_plugin"

setup(
    name=NAME,
    version="0.1.0",
    description="Stock vLLM serves diffusers pipelines with classifier-free guidance split over ranks (CFG-Parallel)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "entrypoints/page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "vllm>=0.32.0,<0.34",
        "torch",
        "diffusers>=0.42.1,<0.43",
        "ftfy",  # diffusers cleans prompts with it, and its Wan image-to-video pipeline does not run without
        "accelerate",
        "transformers",
        "msgspec",
        "pyzmq",
        "pillow",
        "av",
        "openai",
        "tqdm",
    ],
    # One name in every group: `VLLM_PLUGINS=vllm_cfg_plugin` turns all of it on.
    entry_points={
        "vllm.platform_plugins": [f"{NAME} = vllm_cfg_plugin.plugin:platform"],
        "vllm.general_plugins": [f"{NAME} = vllm_cfg_plugin.plugin:register"],
        "vllm.endpoint_plugins": [f"{NAME} = vllm_cfg_plugin.plugin:endpoint"],
    },
)
