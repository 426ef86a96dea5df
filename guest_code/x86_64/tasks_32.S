# SPDX-License-Identifier: GPL-2.0-only
#
# Two tasks in 32-bit protected mode that switch to each other by the hardware's means. Each calls the host as it begins, and
# switches when the host resumes the vCPU. Counts in two registers make the saved state differ at each switch.

	.include "guest.inc"

# Selectors of the GDT that the host provides; the last one is beyond its end.
	.globl CODE, DATA, FIRST_TASK, SECOND_TASK
	.set CODE, 0x08
	.set DATA, 0x10
	.set FIRST_TASK, 0x18
	.set SECOND_TASK, 0x20
	.set NO_SEGMENT, 0x1000

	.macro task name, instructions
	.globl \name
\name:
	ucall UCALL_SYNC
	inc %ebx
	inc %esi
	\instructions
	jmp \name
	.endm

	.code32
	.globl guest_main
guest_main:
	task jump_first, "ljmp $SECOND_TASK, $0"
	task jump_second, "ljmp $FIRST_TASK, $0"

	task call_first, "lcall $SECOND_TASK, $0"
	task call_second, "iret"

	task interrupt_first, "int $32"
	task interrupt_second, "iret"

# #GP has an error code, and its instruction is executed again: the host sets another selector meanwhile.
	task exception_first, "mov $NO_SEGMENT, %edx; mov %edx, %es"
	task exception_second, "pop %edx; iret"
