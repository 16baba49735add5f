"""peft-tsd: fine-tuning along task-specific directions, as a method of Hugging Face PEFT."""
