"""The libraries that drive a training, watched for real at the versions in constraints.txt."""
