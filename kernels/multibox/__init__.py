"""The SSD loss with hard negative mining."""
