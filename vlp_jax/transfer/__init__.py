"""What a pretrained model is used for: downstream tasks and their parts."""
