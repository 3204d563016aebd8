"""Build one TensorRT plan in a process of its own: a crash, or memory it keeps, ends with it.

python -m wanexport.exporter.tensorrt_process JOB.json        prints progress and result as JSON
"""

import sys

from wanexport.exporter.child import main, tell
from wanexport.exporter.to_tensorrt import PlanJob, build_plan

if __name__ == "__main__":
    main(sys.argv[1], lambda job: build_plan(PlanJob(**job), tell))
