"""Adapter folders of the peft library: adapter_config.json and adapter_model.safetensors."""
