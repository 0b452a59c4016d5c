"""The web app: Gradio over the queue of `jobs`; it never makes a video in another way."""
