"""`mtpress eval`: what a checkpoint lost against its BF16 base, measured on the same tokens, one decoder layer at a time."""
