"""Who scores: named teachers, routing, mixtures, union supports, vocabularies that differ, sets of weights."""

from __future__ import annotations

from opd_engine.teachers.checkpoint_files import check_safetensors_folder
from opd_engine.teachers.local import LocalTeacher
from opd_engine.teachers.mixture import mix_teachers
from opd_engine.teachers.pool import TeacherPool
from opd_engine.teachers.protocols import ModelBackend, ProjectingBackend, Teacher
from opd_engine.teachers.sentinel import DeadTeacherError, check_alive
from opd_engine.teachers.spec import TeacherSpec
from opd_engine.teachers.staging import StagedWeights, inference_only
from opd_engine.teachers.union import UnionSupport, union_support
from opd_engine.teachers.vocabularies import check_token_maps, rebucket
from opd_engine.teachers.weight_store import WeightStore, WrongWeightsError

__all__ = [
    "DeadTeacherError",
    "LocalTeacher",
    "ModelBackend",
    "ProjectingBackend",
    "StagedWeights",
    "Teacher",
    "TeacherPool",
    "TeacherSpec",
    "UnionSupport",
    "WeightStore",
    "WrongWeightsError",
    "check_alive",
    "check_safetensors_folder",
    "check_token_maps",
    "inference_only",
    "mix_teachers",
    "rebucket",
    "union_support",
]
