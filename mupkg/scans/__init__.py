"""What a file says: scans and contours read, checked and written."""
