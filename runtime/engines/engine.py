"""What every engine is to the sampling loop."""

from collections.abc import Callable, Mapping

from wanexport.runtime.arrays import Array

Engine = Callable[[Mapping[str, Array]], Array]  # the inputs by name -> the velocity
