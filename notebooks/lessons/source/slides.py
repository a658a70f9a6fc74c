# %% slideshow={"slide_type": "skip"}
import sys

from mupkg import repository

sys.path.append(str(repository() / "notebooks/lessons"))
from classroom import picture, printed

# %% [markdown] slideshow={"slide_type": "slide"}
# # MetricUNet, taken apart
#
# Six lessons on voxel metric learning
#
# He et al., *Medical Image Analysis* 2021,
# [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)
#
# Does it help to teach a UNet which voxels belong together? And how would we know?

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · What does a loss know of a shape?
#
# 120 wrong voxels in each volume, of which we see one slice. Which mask has the lower cross-entropy?

# %% slideshow={"slide_type": "-"}
picture("1_cross_entropy", "figure, axes = plt.subplots(1, 2, figsize=(9, 4.6)")

# %% slideshow={"slide_type": "-"}
printed("1_cross_entropy", "guess_masks)")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Shuffle all voxels
#
# Cross-entropy and DSC do not notice. What, then, makes a network draw organs?

# %% slideshow={"slide_type": "-"}
picture("1_cross_entropy", "the same slice, all voxels shuffled")

# %% slideshow={"slide_type": "-"}
printed("1_cross_entropy", "the same slice, all voxels shuffled")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · A voxel becomes a vector
#
# Grey value, UNet, MetricUNet-R: where can prostate be told from background?

# %% slideshow={"slide_type": "-"}
picture("2_embeddings", "embeddings of {name}")

# %% slideshow={"slide_type": "-"}
printed("2_embeddings", "aucs = {}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A scatter is a shadow
#
# The same points: in the plane that PCA shows, and along the direction that separates them.

# %% slideshow={"slide_type": "-"}
picture("2_embeddings", "what PCA shows")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · Why a hinge?
#
# A is Eq. 2 as printed, B has a hinge. Which of the two has learned more?

# %% slideshow={"slide_type": "-"}
picture("3_triplets", "ending = f")

# %% slideshow={"slide_type": "-"}
printed("3_triplets", "for name, loss in losses.items()")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Hard negative sampling
#
# The same random numbers for R and H. Which points differ?

# %% slideshow={"slide_type": "-"}
picture("4_who_still_teaches", "triplets of one patch")

# %% slideshow={"slide_type": "-"}
printed("4_who_still_teaches", "voxel by voxel")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## It is the negative that teaches
#
# The nearer it lies, the more triplets have a gradient.

# %% slideshow={"slide_type": "-"}
picture("4_who_still_teaches", "negatives lie at most")

# %% slideshow={"slide_type": "-"}
printed("4_who_still_teaches", "harder anchors")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · Blurred, or displaced?
#
# Left, around the true contour; right, around the network's own.

# %% slideshow={"slide_type": "-"}
picture("5_contour", "curves[kind, seed]")

# %% slideshow={"slide_type": "-"}
printed("5_contour", "C less UNet")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Is the gain real?
#
# Eight simulated patients: one of them carries the gain. Then a real trial, E1: one training at a time, the test
# answers both ways.

# %% slideshow={"slide_type": "-"}
picture("6_is_the_gain_real", "n = 8 patients, simulated")

# %% slideshow={"slide_type": "-"}
printed("6_is_the_gain_real", "trial E1, phantoms")
