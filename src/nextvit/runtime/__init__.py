"""Running a model wherever it came from: a session maps numpy to numpy, a predictor maps images to typed results."""
