"""The protocol of image classification: settings, data, comparison."""
