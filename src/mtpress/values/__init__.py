"""Whether the numbers of a checkpoint can be those of a trained model, without a second checkpoint to hold them against."""
