"""Using trained models: loading, classification, metrics, and attention maps."""
