"""A run or a sweep as its launcher sees it: folders, attempts, submitting. No torch."""
