"""Small trained updates beside a frozen model: LoRA and DoRA, in the layout of PEFT."""
