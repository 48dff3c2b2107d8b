"""The rooms' foundation: options and registries, safe YAML, composition, and the named slices of tensors."""
