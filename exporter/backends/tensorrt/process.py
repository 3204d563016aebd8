"""Build one TensorRT plan in a process of its own: a crash, or memory it keeps, ends with it.

python -m wanexport.exporter.backends.tensorrt.process JOB.json
"""

import sys

from wanexport.exporter.backends.tensorrt.plan import PlanJob, build_plan
from wanexport.exporter.child.child import main, tell

if __name__ == "__main__":
    main(sys.argv[1], lambda job: build_plan(PlanJob(**job), tell))
