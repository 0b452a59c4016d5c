"""One persistent queue of generation jobs: states, store, workers, cancel, progress, retention."""
