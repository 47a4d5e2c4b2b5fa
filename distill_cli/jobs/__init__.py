"""A run or a sweep as its launcher sees it: folders, attempts, submitting, MLflow. No torch."""
