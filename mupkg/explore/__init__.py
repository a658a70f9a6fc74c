"""Views to explore with in JupyterLab (notebook 08): cases, embeddings, samplers at work, training films."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "case": ["CaseViewer"],
        "linked": ["DistanceMap", "EmbeddingExplorer"],
        "panels": ["show"],
        "samplers_and_film": ["FilmPlayer", "SamplersAtWork", "read_films"],
        "seen": ["SeenCase"],
        "volumes": ["show_itkwidgets"],
        "workbench": ["Workbench"],
    },
)
