"""Four small files that every stage may use: seeding, distributed, hashing, io."""
