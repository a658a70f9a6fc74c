"""A question put in advance: its protocol, its tables, and what they say."""
