"""Trained models for others: exported files, the Hugging Face Hub, names in timm."""
