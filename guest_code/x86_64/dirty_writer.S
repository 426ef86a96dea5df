# SPDX-License-Identifier: GPL-2.0-only
#
# Writes to pages of test memory in the order of a table that the host provides, until the host sets BLOCK_STOP.
#
# Write number n stores n into its page, and then publishes n in the vCPU's block. So a value in memory identifies the write
# that put it there. The host knows at any time that all writes up to the published number are done, and that the next one
# may be in flight.

	.include "guest.inc"

# The vCPU's block (%rdi). The host accesses it through these symbols. BLOCK_WRITES, which the guest writes while running, and
# BLOCK_STOP, which the host writes meanwhile, have cache lines of their own.
	.globl BLOCK_FILL_START, BLOCK_FILL_END, BLOCK_TABLE, BLOCK_TABLE_END, BLOCK_TABLE_LOOP, BLOCK_SPARSE
	.globl BLOCK_WRITES, BLOCK_STOP, BLOCK_SIZE, WRITES_PER_BATCH
	.set BLOCK_FILL_START, 0	# start of the range to touch before logging is enabled
	.set BLOCK_FILL_END, 8		# end of that range
	.set BLOCK_TABLE, 16		# the table: a gva per write
	.set BLOCK_TABLE_END, 24	# its end; the size is a multiple of WRITES_PER_BATCH entries
	.set BLOCK_TABLE_LOOP, 32	# where to continue after its end
	.set BLOCK_SPARSE, 40		# instructions per write: 0: few; 1: at least 20; 2: at least 40
	.set BLOCK_WRITES, 64		# published: number of writes done
	.set BLOCK_STOP, 128		# nonzero: sync after this batch
	.set BLOCK_SIZE, 192

	.set WRITES_PER_BATCH, 64	# writes between two checks of BLOCK_STOP
	.set PAGE_SIZE, 4096
	.set FILL_UNROLL, 32
	.set PADDING, 15		# with the 5 others: 20 instructions per write
	.set MORE_PADDING, 35

	.macro store_and_publish
	inc %rdx
	mov %rdx, (%rax)
	mov %rdx, BLOCK_WRITES(%rdi)
	.endm

	.macro dense_write
	lodsq				# the next address
	store_and_publish
	.endm

	.macro sparse_write padding
	mov (%rsi), %rax		# the next address; two instructions, to have more of them per write
	add $8, %rsi
	store_and_publish
	.rept \padding
	nop
	.endr
	.endm

	.macro batches name, one_write, padding
\name:
	.rept WRITES_PER_BATCH
	\one_write \padding
	.endr
	cmp BLOCK_TABLE_END(%rdi), %rsi
	jne 1f
	mov BLOCK_TABLE_LOOP(%rdi), %rsi
1:	cmpl $0, BLOCK_STOP(%rdi)
	je \name
	ucall UCALL_SYNC
	jmp \name
	.endm

	.globl guest_main
guest_main:
	mov BLOCK_FILL_START(%rdi), %rbx
	mov BLOCK_FILL_END(%rdi), %rcx
	xor %edx, %edx
fill_many:
	lea FILL_UNROLL * PAGE_SIZE(%rbx), %rax
	cmp %rcx, %rax
	ja fill_rest
	.set page, 0
	.rept FILL_UNROLL
	mov %rdx, page * PAGE_SIZE(%rbx)
	.set page, page + 1
	.endr
	mov %rax, %rbx
	jmp fill_many
fill_rest:
	cmp %rcx, %rbx
	jae filled
	mov %rdx, (%rbx)
	add $PAGE_SIZE, %rbx
	jmp fill_rest
filled:
	ucall UCALL_SYNC
	mov BLOCK_TABLE(%rdi), %rsi
	cmpq $1, BLOCK_SPARSE(%rdi)
	je sparse_writes
	ja very_sparse_writes
	batches dense_writes, dense_write
	batches sparse_writes, sparse_write, PADDING
	batches very_sparse_writes, sparse_write, MORE_PADDING
