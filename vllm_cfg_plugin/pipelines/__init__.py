"""The model families: one file for each, and what they share.

- `base`: the contract between the step loop and a family; `registry`: the table of those that are served.
- A family's pipeline, for the engine and to be called directly: `qwen_image` (text-to-image), `qwen_image_edit`,
  `qwen_image_layered`, on `qwen_image_base`, `qwen_image_cfg` (the denoising loop) and `qwen_image_conditioned` (images
  that come along); `flux`, `longcat_image` and `longcat_image_edit`, on `latent_tokens`; `sd3`; `z_image`; `wan`
  (text-to-video) and `wan_image_to_video`, on `wan_base`.
- A family's packed transformer: `qwen_image_packed`, `flux_packed`, `longcat_image_packed`, `sd3_packed`,
  `z_image_packed` (with `z_image_layout`), `wan_packed` (with `wan_attention`); all on `packed_model`,
  `packed_attention`, `modulation` and `linear`, and those of dual-stream blocks on `mmdit`.
- Autoencoders of several threads and single images: `qwen_image_vae`, `wan_vae`.
- `direct_call` (when guidance is on, the loop), `flow_schedule` (timesteps), `vision_processor` (images for encoders).
"""
