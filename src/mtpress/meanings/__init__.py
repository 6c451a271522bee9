"""What the files beside the weights mean, however they spell it: config.json, processors, tokenizer, generation defaults, template.

Each module turns the files of a checkpoint into what an engine computes with, and says where two checkpoints differ in that.
"""
