"""The bridge to nnU-Net v2, an optional extra: a study's regions out, its masks in, trainers with our branch."""
