"""What tests that compile need."""

import pytest


def cpp_compiler():
    """Name of the C++ compiler that inductor would take; None if there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


COMPILES = [
    pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler, and none was found"),
    # The compiler's own warnings, of itself and of the leaves that it looks at.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
