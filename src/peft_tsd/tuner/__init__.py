"""The PEFT method: LoRA-Dash, LoRA-Init and LoRA-TSD as layers, a configuration and a model."""
