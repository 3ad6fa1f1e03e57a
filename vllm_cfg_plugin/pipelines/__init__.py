"""The model families, and what they share.

The contract: `base`, between the step loop and a family; `registry`, the table of the families that are served.

The families, each a pipeline for the engine and for direct calls, and a packed transformer over diffusers' weights:

- Qwen-Image: `qwen_image` (text-to-image), `qwen_image_edit` and `qwen_image_layered`, which take images
  (`qwen_image_conditioned`), all on `qwen_image_base` and its denoising loop `qwen_image_cfg`; `qwen_image_packed`.
- Flux: `flux`; `flux_packed`.
- LongCat-Image: `longcat_image` (text-to-image), `longcat_image_edit`; `longcat_image_packed`.
- Stable Diffusion 3: `sd3`; `sd3_packed`.
- Z-Image: `z_image`; `z_image_packed`, `z_image_layout`.
- Wan: `wan` (text-to-video), `wan_image_to_video`, both on `wan_base`; `wan_packed`, `wan_attention`.

What the pipelines share: `image_pipeline` (noise, timesteps and pixels of images), `latent_tokens` (those whose latents
are tokens), `direct_call` (when guidance is on, the denoising loop), `flow_schedule` (timesteps), `autoencoders` (the
decode; for single images or several threads at once `qwen_image_vae`, `wan_vae`), `vision_processor` (images for text
encoders).

What the packed transformers share: `shared_modules` (diffusers' modules in a class of ours), `packed_attention`,
`modulation`, `linear`, and `mmdit`, the blocks of all families with a text and an image stream.
"""
