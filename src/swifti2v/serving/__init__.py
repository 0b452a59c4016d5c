"""The HTTP service: OpenAI's `/v1/videos` over the queue of `jobs`."""
