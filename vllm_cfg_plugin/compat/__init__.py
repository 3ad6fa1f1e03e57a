"""Work-arounds for upstream behaviour, one function each: symptom, cause, and when it can go; safe to call again.

Where vLLM 0.32 and 0.33 differ, what we write suits both, and nothing asks for the release:
- `Executor.set_kv_cache_layout` takes one argument more in 0.33: ours takes any.
- `SchedulerInterface.has_request` is abstract in 0.33 and unknown to 0.32: ours is an ordinary method.
- A paused engine of 0.33 rejects new requests with `RetryableRequestError`, where that of 0.32 keeps them waiting:
  `EngineCalls` makes it our own error.
"""
